"""B."""
import random
NAMES = "alice bruno carla david elena felix greta henry".split()
VERBS = [("like", "love", "enjoy"), ("hate", "dislike", "avoid"), ("call", "phone", "ring"), ("see","meet","visit")]
ANT = {0: 1, 1: 0}
def say(r, m, style):
    cluster, a, b, positive = m
    verb = r.choice(VERBS[cluster])
    n = "" if positive else "not "
    if style == 0: return f"does {a} {n}{verb} {b}"
    return f"is {b} someone that {a} does {n}{verb}"
def change(r, m, kind):
    c, a, b, p = m
    if kind == "swap": return (c, b, a, p)
    if kind == "negation": return (c, a, b, not p)
    if kind == "verb": return (r.choice([x for x in range(len(VERBS)) if x != c]), a, b, p)
    o = r.choice([x for x in NAMES if x not in (a, b)])
    return (c, o, b, p) if r.random() < .5 else (c, a, o, p)
KINDS = ["entity", "swap", "negation", "verb"]
W = [.3,.3,.2,.2]
def generate(n, seed, w=W):
    r = random.Random(seed); out = []; seen=set()
    while len(out) < n:
        label = len(out) % 2
        a, b = r.sample(NAMES, 2)
        m = (r.randrange(len(VERBS)), a, b, r.random() < .6)
        m2 = m if label else change(r, m, r.choices(KINDS, w)[0])
        if label==1 and m2[0] in ANT and r.random()<.3: m2=(ANT[m2[0]],*m2[1:3],not m2[3])
        s1 = r.randrange(2); s2=r.randrange(2)
        q=(say(r, m, s1), say(r, m2, s2), label)
        if q[0]==q[1] or frozenset(q[:2]) in seen: continue
        seen.add(frozenset(q[:2])); out.append(q)
    return out
