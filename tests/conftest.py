"""What holds for every test: one thread, no network, no Ray token in HOME, and the same hypothesis examples each time.

The variables are set before anything imports torch, Ray or transformers; processes that the tests start inherit them.
"""

import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
}

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("tutelage", derandomize=True, print_blob=True, deadline=None)
hypothesis.settings.load_profile("tutelage")
