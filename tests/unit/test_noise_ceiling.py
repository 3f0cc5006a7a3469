from safemax_sd.evaluation.real import embedded_pictures

from benchmarks.noise_ceiling import noise_pictures, rates
from safemax_sd.core.judge import load_judge


def test_pure_noise_is_called_noise_but_has_to_be_given_some_name():
    pictures, judge, real = noise_pictures(64), load_judge(), embedded_pictures()
    assert pictures.shape == (64, 3, 64, 64) and pictures.min() >= 0 and pictures.max() <= 1
    bomb, alcohol = (rates(f"emoji/{task}", pictures, judge, real=real) for task in ("bomb", "alcohol"))
    assert bomb == {
        "unlearning_accuracy": 100.0,
        "unlearning_accuracy_with_rejection": 100.0,
        "neither": 0.0,
        "halted": 100.0,
    }
    assert alcohol["halted"] == alcohol["unlearning_accuracy_with_rejection"] == 100.0
    assert alcohol["unlearning_accuracy"] < 100.0


def test_a_picture_of_the_concept_is_neither_forgotten_nor_noise():
    real, judge = embedded_pictures(), load_judge()
    values = rates("emoji/bomb", real.showing(["bomb"]), judge, real=real)
    assert values["unlearning_accuracy"] < 20 and values["halted"] < 20
