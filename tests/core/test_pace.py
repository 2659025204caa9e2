import pytest

from ray_ckpt.core.pace import rest_s


@pytest.mark.parametrize(
    ("num_bytes", "elapsed_s", "bytes_per_s", "expected"),
    [(300, 1.0, 100.0, 2.0), (300, 3.0, 100.0, 0.0), (300, 9.0, 100.0, 0.0), (300, 0.0, None, 0.0)],
)
def test_a_rest_brings_the_average_down_to_the_rate(
    num_bytes: int, elapsed_s: float, bytes_per_s: float | None, expected: float
) -> None:
    assert rest_s(num_bytes, elapsed_s, bytes_per_s=bytes_per_s) == expected
