"""Working attacks, run against the defences of foedus itself and, by ``foedus audit``, against a user's run."""
