"""python -m pytest tests/test_web.py

Which addresses are those of this machine. The requests themselves are tested with their two users, in
test_retriever.py and test_measures.py.
"""

import socket

import pytest

from web import InputError, check_url, is_this_machine


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "127.0.0.1",
        "127.1.2.3",
        "127.1",
        "::1",
        "0.0.0.0",
        "a.localhost",
        "localhost.",
        socket.gethostname().lower(),
    ],
)
def test_this_machine(host):
    assert is_this_machine(host)


@pytest.mark.parametrize(
    "host", ["8.8.8.8", "2001:4860:4860::8888", "example.org", "localhost.org", "127.0.0.1.org", "a..b", ""]
)
def test_another_machine(host):
    assert not is_this_machine(host)


@pytest.mark.parametrize(
    "url",
    [
        "http://host",
        "https://host:1/v1/",
        "http://[::1]:8000/retrieve",
        "http://127.1:80",
        "http://a-b.c_d/x?y=1",
    ],
)
def test_addresses(url):
    assert check_url(url, "--judge_url") == url.rstrip("/")


@pytest.mark.parametrize(
    "url", ["host", "ftp://host", "http://", "http://h:0", "http://h:99999", "http://h\n", "http://ü/"]
)
def test_no_addresses(url):
    with pytest.raises(InputError, match=r"--judge_url .*http") as error:
        check_url(url, "--judge_url")
    assert "\n" not in str(error.value)
