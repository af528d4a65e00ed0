"""What holds whatever the shapes, spacings, numbers of modalities and classes (hypothesis)."""

from hypothesis import HealthCheck, settings

PROFILE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
networks_checked = settings(PROFILE, max_examples=6)
solved = settings(PROFILE, max_examples=10)  # linear programs, exact tests
checked = settings(PROFILE, max_examples=25)
