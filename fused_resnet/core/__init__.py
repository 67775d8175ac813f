"""What everything else stands on: the definition of a tail, its tensors and its layouts. Imports nothing above."""
