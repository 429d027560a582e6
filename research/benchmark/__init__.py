"""The speed of the operations of `pallas_kernels` and of whole models, compared with peers."""
