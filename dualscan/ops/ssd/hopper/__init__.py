"""The SSD kernels in Gluon, for Hopper GPUs, with explicit overlap: `triton_scan_hopper`, `triton_gradients_hopper`.

Plain Triton waits for each product before it starts the next. Here products, copies and elementwise work of a program
overlap by hand. Shapes that `triton_scan_hopper.fits` refuses take the plain kernels, which are also the cross-check.
"""
