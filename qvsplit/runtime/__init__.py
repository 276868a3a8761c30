"""The process and its machine: signals, devices, files written whole."""
