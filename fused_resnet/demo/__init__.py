"""The network that the demo trains, for ``fused-resnet predict fused_resnet.demo.digits:DigitsResNet``."""
