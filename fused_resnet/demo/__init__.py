"""``make demo``: the whole path on real images: train, save, fuse, explain, compare, time, draw (`run.run`)."""
