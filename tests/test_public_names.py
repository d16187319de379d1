import bitwright


def test_all_names_exist_and_are_sorted():
    assert bitwright.__all__ == sorted(bitwright.__all__)
    assert all(hasattr(bitwright, name) for name in bitwright.__all__)


def test_public_names_have_docstrings():
    assert [name for name in bitwright.__all__ if not getattr(bitwright, name).__doc__] == []
