from tests.contracts import NetworkContract


class TestShaSpec(NetworkContract):
    backbone = "shaspec"
    options = (
        {},
        {"alignment": "mse", "substitution": "first"},
        {"alignment": "kl", "projection": "zero"},
        {"alignment": "ce"},
    )
