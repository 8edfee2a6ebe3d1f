"""`medray doctor` names what is missing or mismatched, with the fix."""

from medray.commands import doctor


def test_wrong_and_missing_versions_come_with_a_fix():
    found = {
        check.name: check
        for check in doctor.packages(
            ["pydantic==1.0", "no-such-package>=2", "pyyaml>=6", "ray==1; python_version<'3'"]
        )
    }
    assert not found["pydantic"].ok
    assert "wanted ==1.0" in found["pydantic"].found
    assert "pip install 'pydantic==1.0'" in found["pydantic"].fix
    assert found["no-such-package"].found == "missing"
    assert found["pyyaml"].ok
    assert "ray" not in found


def test_this_environment_is_well():
    """The suite runs where `make setup` has been: every package check must pass."""
    bad = [str(check) for check in doctor.packages() if not check.ok]
    assert bad == []


def test_platforms():
    check = doctor.vllm_platform()
    assert check.ok
    assert check.found in ("cpu", "cuda")
    assert doctor.shared_memory().name == "shared memory"
