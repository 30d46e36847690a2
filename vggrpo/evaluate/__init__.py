"""Judges that share nothing with the rewards, and what is made of their verdicts."""
