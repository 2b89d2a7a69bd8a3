"""Comparison of networks with other runtimes in one process. Requires ``pip install 'dsconv[bench,mnn]'``."""

from dsconv.benchmarking.bench import bench
from dsconv.benchmarking.profiling import Profile, profile
from dsconv.benchmarking.results import Bench, Timing
from dsconv.names import PEERS

__all__ = ["PEERS", "Bench", "Profile", "Timing", "bench", "profile"]
