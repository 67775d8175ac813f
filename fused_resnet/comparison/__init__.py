"""A fused model beside its original: errors (`verify`) and the sides of a timing (`sides`)."""
