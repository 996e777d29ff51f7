from pytest_llem.study.config import ExperimentConfig


def unmet(config: ExperimentConfig) -> list[str]:
    return []
