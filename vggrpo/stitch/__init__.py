"""How latent geometry models are made and judged: `vggrpo stitch RECIPE`, of the embedded stack (`run.py`), whose truth
is known, or of any Wan's VAE with any geometry model (`pair.py`)."""
