// @ts-check
// What all inputs of a form know of their parameter.

/** @typedef {{name: string, wants: string, is_required: boolean, default: string, control: string, choices?: any[], height: number, width: number, paper: number, ink: number}} Parameter */
/** @typedef {{value?: any, text?: string, buffer?: ArrayBuffer, as?: string}} Entry */

/** @param {Parameter} parameter */
export const hintOf = (parameter) => (parameter.is_required ? "" : `default ${parameter.default || "none"}`);

/** @param {Parameter} parameter */
export function missing(parameter) {
  if (!parameter.is_required) return undefined;
  throw new Error(`${parameter.name} is missing: ${parameter.wants}`);
}
