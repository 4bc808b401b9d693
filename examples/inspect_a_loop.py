"""What the compiler made of a loop: which rewrites fired and why, and the first lines of the code that runs."""

import nestloop as nl
from nestloop import zoo

for loop in (zoo.MTTTLinear, zoo.SelfAttention):
    print(nl.explain(loop))
    print()
    print(nl.inspect(loop, stage="rewrite"))
    print()

print(*nl.inspect(zoo.MTTTLinear, stage="emit").splitlines()[:30], sep="\n")
