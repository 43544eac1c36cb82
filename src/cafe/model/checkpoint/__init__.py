"""What is on disk: the model directory, adapters, and conversion from other layouts."""
