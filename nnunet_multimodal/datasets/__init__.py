"""Data sets in nnU-Net's raw format; one module per source."""
