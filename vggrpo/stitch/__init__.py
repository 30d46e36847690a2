"""How the embedded latent geometry model is made and judged: `vggrpo stitch launch/recipes/stitch/tiny.yaml`."""
