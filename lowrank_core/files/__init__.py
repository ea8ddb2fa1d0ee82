"""What is on disk, read without believing it: JSON records, arrays with digests, the weight files of a checkpoint. Torch-free."""
