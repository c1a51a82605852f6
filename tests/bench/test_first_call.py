import os

from longwave.bench.first_call import first_calls, nothing_compiled


def test_triton_has_an_empty_cache_for_as_long_as_it_lasts(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "before")
    with nothing_compiled():
        assert os.listdir(os.environ["TRITON_CACHE_DIR"]) == []
    assert os.environ["TRITON_CACHE_DIR"] == "before"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    with nothing_compiled():
        folder = os.environ["TRITON_CACHE_DIR"]
    assert "TRITON_CACHE_DIR" not in os.environ
    assert not os.path.exists(folder)


def test_one_line_for_each_contender_of_a_case():
    checked = {
        "longwave": {"difference": 0.0, "first_call": 1.5, "first_backward": 3.25},
        "peer": {"difference": 0.0, "first_call": 60.0, "first_backward": None},
    }
    results = [{"case": f"op b1, {direction}", "checked": checked} for direction in ("forward", "backward")]
    assert first_calls(results).splitlines() == [
        "seconds of the first call  forward  backward",
        "op b1: longwave                1.5      3.25",
        "op b1: peer                     60         -",
    ]
