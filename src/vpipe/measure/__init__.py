"""What blocks take: run one by one on the ranks of a run, or counted on the meta device."""
