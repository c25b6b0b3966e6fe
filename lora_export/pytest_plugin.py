"""For pytest: `pytest --lora-certificate DIR` makes a test of each verdict of a certificate.

pytest loads this file in every session where the package is installed, so it imports nothing of
weight until the option is given.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lora_export.records import Certificate, Verdict

OPTION = "--lora-certificate"
NODE = "lora-certificate"  # ids begin with it, wherever the certificate lies
_CERTIFICATE = pytest.StashKey["Certificate"]()


class Verdicts(pytest.Collector):
    """The tests of one certificate."""

    def collect(self) -> Iterator["VerdictItem"]:
        """Give one test for each verdict; one that fails where there are none."""
        from lora_export import report

        for verdict in report.verdicts(self.config.stash[_CERTIFICATE]):
            name = f"{verdict.check}[{verdict.subject}]"
            yield VerdictItem.from_parent(self, name=name, verdict=verdict)


class VerdictItem(pytest.Item):
    """One verdict as a test: whatever is no pass fails."""

    def __init__(self, *, verdict: "Verdict", **known: Any) -> None:
        super().__init__(**known)
        self.verdict = verdict

    def runtest(self) -> None:
        """Fail with the reasons, unless the verdict is a pass."""
        from lora_export import report

        if not self.verdict.passed:
            reasons = "\n".join(report.reasons(self.verdict))
            pytest.fail(f"{self.verdict.status}: {reasons}", pytrace=False)

    def reportinfo(self) -> tuple[Any, None, str]:
        """Return what stands above a failure."""
        return self.path, None, self.name


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("lora-export").addoption(
        OPTION,
        metavar="DIR",
        help="Make a test of each verdict of the certificate in DIR: what `lora-export run` wrote.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Read the certificate, before anything is collected."""
    folder = config.getoption(OPTION)
    if folder is None:
        return
    from lora_export import certificates
    from lora_export.errors import InputError

    try:
        config.stash[_CERTIFICATE] = certificates.read(folder)
    except InputError as error:
        raise pytest.UsageError(f"{OPTION}: {error}") from error


@pytest.hookimpl(tryfirst=True)  # -k, -m and --last-failed choose among what they are given
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Put the tests of the certificate behind the others."""
    if _CERTIFICATE in session.config.stash:
        items.extend(Verdicts.from_parent(session, name=NODE, nodeid=NODE).collect())


@pytest.fixture(scope="session")
def lora_certificate(pytestconfig: pytest.Config) -> "Certificate":
    """The certificate of `--lora-certificate DIR`; a test that asks for it fails without one."""
    if _CERTIFICATE not in pytestconfig.stash:
        pytest.fail(f"no certificate: run pytest with {OPTION} DIR", pytrace=False)
    return pytestconfig.stash[_CERTIFICATE]
