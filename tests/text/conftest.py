import tarfile

import pytest

from tests.text.fake_job import add, png


@pytest.fixture
def source(tmp_path):
    """Four tars of five samples; captions occur twice; three samples cannot be used."""
    (tmp_path / "tars").mkdir()
    for number in range(4):
        with tarfile.open(tmp_path / "tars" / f"{number:05d}.tar", "w") as tar:
            for i in range(number * 5, number * 5 + 5):
                picture = png(i)
                add(tar, f"{i:04d}.png", picture[:-40] if i in (3, 11) else picture)
                add(tar, f"{i:04d}.txt", b"" if i == 7 else b"caption number %d" % (i // 2))
    return f"webdataset:{tmp_path}/tars/*.tar"
