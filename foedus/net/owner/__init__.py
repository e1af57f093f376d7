"""What belongs to the owner of the data: rules, consent, approvals, the ledger of what left, the example store."""
