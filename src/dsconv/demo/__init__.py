"""A small ResNet with trained weights, and held-out handwritten digits to try it on: everything the demo needs."""

from dsconv.demo.network import PREPROCESS, DigitsResNet, digits_resnet, load_digits, load_network

__all__ = ["PREPROCESS", "DigitsResNet", "digits_resnet", "load_digits", "load_network"]
