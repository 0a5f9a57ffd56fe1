import pytest

pytest.register_assert_rewrite("kernels_in_jax")
