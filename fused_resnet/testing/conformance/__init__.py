"""The test that ``pytest --pyargs fused_resnet.testing`` runs."""
