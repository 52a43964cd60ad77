"""The campaign of bad input in short; ``python -m tests.campaigns.bodies`` is the long form."""

from pathlib import Path

from tests.campaigns.bodies import FLAGS, Campaign
from tests.support.server import Server


def test_bad_input_is_refused_in_time_and_harms_nobody(tiny_llama: Path, tmp_path: Path) -> None:
    # A server of its own: in a short window, a body that asks for all tokens is answered soon.
    campaign = Campaign(seed=1, count=80)
    with Server(tiny_llama, FLAGS, tmp_path / "log") as server:
        campaign.run(server)
    assert not campaign.tally.faults, "\n".join(map(str, campaign.tally.faults[:10]))
    assert min(campaign.tally.refused().values()) > 20, campaign.tally
