"""Whole networks beside other runtimes, in one process. The runtimes: ``pip install 'dsconv[bench]'``."""

from dsconv.benchmarking.bench import bench
from dsconv.benchmarking.peers import PEERS
from dsconv.benchmarking.results import Bench, Timing

__all__ = ["PEERS", "Bench", "Timing", "bench"]
