"""What a run will need and how long it will take, before it is submitted; needs no GPU. `python -m trainer.plan`."""
