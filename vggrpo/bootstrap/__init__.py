"""How the embedded stack is made: every stage is a recipe, a resumable run, a held-out evaluation and a card."""
