// What the programs for node share; `features.py` describes the arguments and the results.
import { appendFileSync } from "node:fs";

const FEATURE_MS = 120_000;

export async function main(checks) {
  const [url, model, key, , results, ...chosen] = process.argv.slice(2);
  const server = { url, v1: `${url}/v1`, model, key };
  const write = (value) => appendFileSync(results, JSON.stringify(value) + "\n");
  const names = Object.keys(checks).filter((name) => !chosen.length || chosen.includes(name));
  write(names);
  for (const name of names) {
    let error = null;
    const late = new Promise((_, reject) =>
      setTimeout(() => reject(new Error(`It took longer than ${FEATURE_MS} ms.`)), FEATURE_MS).unref(),
    );
    try {
      await Promise.race([checks[name](server), late]);
    } catch (caught) {
      console.error(name, caught);
      error = `${caught.name}: ${caught.message}`.slice(0, 600);
    }
    write({ feature: name, error });
  }
  process.exit(0);
}
