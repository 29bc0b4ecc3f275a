"""Learning from preferences without sampling: DPO, IPO, ORPO, SimPO and KTO."""
