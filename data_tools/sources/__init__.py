"""Raw data to samples: where the files are (listing), what a sample must be (checks), how it is made (samples)."""
