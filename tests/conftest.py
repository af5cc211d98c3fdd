import os
from pathlib import Path

import pytest

os.environ['WANDB_MODE'] = 'offline'   # read once, when wandb is first used

@pytest.fixture(scope='session')
def root():
    "The root of the repository"
    return Path(__file__).parent.parent
