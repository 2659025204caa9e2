"""How long who works in the background waits, so that others get their part. Pure."""


def rest_s(num_bytes: int, elapsed_s: float, *, bytes_per_s: float | None) -> float:
    """Seconds until `num_bytes` in all are no more than that rate; None is no limit.

    >>> rest_s(300, 2.0, bytes_per_s=100.0), rest_s(300, 5.0, bytes_per_s=100.0)
    (1.0, 0.0)
    """
    return 0.0 if bytes_per_s is None else max(0.0, num_bytes / bytes_per_s - elapsed_s)
