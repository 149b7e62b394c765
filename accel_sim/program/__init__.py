"""Programs of the accelerator: instructions, the container they travel in, their text form and their checks."""
