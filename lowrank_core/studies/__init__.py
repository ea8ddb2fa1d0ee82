"""The Optuna study of a run as everyone reads it: the space, where it is stored, its trials as records, what they tell. Torch-free."""
