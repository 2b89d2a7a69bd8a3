"""Small ResNet with trained weights, and held-out handwritten digits for the demo."""

from dsconv.demo.network import PREPROCESS, DigitsResNet, digits_resnet, load_digits, load_network

__all__ = ["PREPROCESS", "DigitsResNet", "digits_resnet", "load_digits", "load_network"]
