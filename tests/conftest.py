from pathlib import Path

import pytest

@pytest.fixture(scope='session')
def root():
    "The root of the repository"
    return Path(__file__).parent.parent
