"""Processes that are as fresh as new ones, and start in milliseconds instead of seconds.

They are forked from a server that has imported torch and Ray once. What reads the environment when
it is imported, as huggingface_hub does, is not among it: a fork has the environment it is given.
"""

import functools
import multiprocessing
from multiprocessing.context import ForkServerContext

_PRELOAD = [
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "ray.train.torch",
    "ray.job_submission",
    "ray_ckpt.tensors.manager",
    "ray_ckpt.storage.s3.store",
    "tests.tensors.tiny",
]


@functools.cache
def fork_server() -> ForkServerContext:
    """Where they come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context
