"""Second moments of inputs and output gradients, streamed over the calibration windows, and where they are stored."""
