"""Which kernel runs a call: what has been verified and measured on this device, else the rules."""
