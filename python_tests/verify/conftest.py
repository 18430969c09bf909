from ptx.conftest import pytest_collection_modifyitems  # noqa: F401
