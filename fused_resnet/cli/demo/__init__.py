"""``fused-resnet demo``: the whole path on real images: train, save, fuse, explain, compare, time, draw."""
