"""Everything that is worth knowing about this library on one GPU, in one command (``docs/gpu.md``)."""
