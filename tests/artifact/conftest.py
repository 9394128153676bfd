import pytest
from artifact_helpers import make_state


@pytest.fixture(scope="session")
def state():
    return make_state()
