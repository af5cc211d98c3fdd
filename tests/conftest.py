import os, random
from pathlib import Path

import matplotlib.pyplot as plt, numpy as np, pytest, torch

os.environ['WANDB_MODE'] = 'offline'   # read once, when wandb is first used

@pytest.fixture(scope='session')
def root():
    "The root of the repository"
    return Path(__file__).parent.parent

@pytest.fixture(autouse=True)
def seed():
    "Each test draws the same numbers, alone or after others, and into figures of its own"
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    plt.close('all')
